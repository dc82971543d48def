"""What ``fedtorch COMMAND`` does, one module a command; each takes its arguments, gives the exit status."""
