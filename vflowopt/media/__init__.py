"""What a client sent: a picture or a video, decoded and checked."""
