"""The study: methods and their parts compared on the built-in world, over bases and seeds."""
