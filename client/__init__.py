"""What runs inside a hospital: admission, data sources, local training and evaluation."""
