"""What `dengine.engine` is made of: a node's life, and its calls as the client library has them."""
