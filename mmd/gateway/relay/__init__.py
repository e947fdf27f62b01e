"""The relay: HTTP/1 between clients, engines and the gateway's own application. README.md beside this file is its design."""
