"""What watches over a training: non-finite numbers, failures, dead worker processes, ill-shaped observations."""
