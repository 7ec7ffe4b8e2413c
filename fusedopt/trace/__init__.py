"""From callbacks to programs: symbolic tensors, recording numbers, and the tracer that runs callbacks on them."""
