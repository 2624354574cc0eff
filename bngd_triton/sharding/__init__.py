"""Steps of DTensors, whose slices lie on several processes; loaded when one is met."""
