"""The project's commands. In a checkout: `python -m scripts.NAME`; installed: `ast-NAME`."""
