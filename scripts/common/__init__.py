"""What every command needs: options, files, bundled models and recipes."""
