"""Times the parts, next to what people use today."""
