"""One step: which parameters share a kernel, what runs eagerly, and how steps of known structure are bound."""
