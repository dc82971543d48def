"""What is done to a released update before it is sent, and undone at the server."""
