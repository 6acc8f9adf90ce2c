"""What `dengine.engine` is made of: a node that an app runs, and its calls as a client has them."""
