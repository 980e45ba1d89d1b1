"""TPUs that are not there: what libtpu has to be told to compile for a topology on a machine without one.

`os.environ |= ENVIRONMENT` comes before the first import of jax; `make collectives` installs libtpu.
"""

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_LOG_DIR": "disabled",  # what libtpu has to say goes to stderr, from TPU_STDERR_LOG_LEVEL on, and to no file
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TF_CPP_MIN_LOG_LEVEL": "1",
}
