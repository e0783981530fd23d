"""The colors of all pictures: three that Okabe and Ito chose for all color vision, and a gray."""

BLUE, ORANGE, GREEN, GRAY = "#0072B2", "#E69F00", "#009E73", "#666666"
