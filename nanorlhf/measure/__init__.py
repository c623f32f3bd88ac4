"""What the commands bench and memory stand on."""
