"""What every command needs: options, files, what is bundled."""
