"""Foundation of every op: the call context, packed documents, torch custom ops and the declaration of kernels."""
