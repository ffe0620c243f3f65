"""What crosses the wire: our payloads as Flower records. Shared by server and client."""
