"""What the user asks for: flags, the configuration file, the settings made of both, and their reload."""
