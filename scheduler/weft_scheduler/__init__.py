"""The pure scheduler: decides what every iteration runs, from integers and clocks alone."""
