"""One file per family of rules; the equations and their source stand at the top of each."""
