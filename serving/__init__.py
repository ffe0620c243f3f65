"""The local serving adapter: verified releases over HTTP, without torch."""
