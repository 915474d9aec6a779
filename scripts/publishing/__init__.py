"""Model cards and Hub repositories."""
