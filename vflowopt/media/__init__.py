"""The input of a model: a picture or a video, decoded and checked."""
