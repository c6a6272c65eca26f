"""How pictures are drawn: the canvas, typefaces, icons and the layout of objects."""
