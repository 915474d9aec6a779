"""File name suffixes of audio files."""

AUDIO_SUFFIXES = {
    *(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".caf"),
    *(".w64", ".rf64", ".m4a", ".mp4", ".aac", ".webm", ".wma"),
}
