"""Brain-to-text decoding: HDF5 trials streamed from S3, a GRU with diphone CTC, SageMaker jobs."""
