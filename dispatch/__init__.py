"""Running the engine somewhere and following it: supervisor, transports, run directories, cursor-exact tail."""
