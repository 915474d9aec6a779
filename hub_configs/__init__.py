"""Data that is installed with the commands: recipes and Hub repositories. No code."""
