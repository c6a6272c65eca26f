"""Drawing of pictures: the canvas, typefaces, icons and the layout of objects."""
