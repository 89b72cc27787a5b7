"""Who somebody is: Ed25519 keys, signatures over canonical bytes, and the server keys that a client
remembers."""
