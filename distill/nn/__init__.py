"""What both teachers and students build on."""
