"""The C++ extension fusedopt._C: how it is compiled, built where it is missing, and stood in for by Python."""
