"""Long Range Arena (Tay et al., 2021) in the sizes that KDEformer's paper used: data, model and training, a file each."""
