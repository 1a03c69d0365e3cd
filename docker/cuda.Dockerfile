# The code and its requirements, for hosts with NVIDIA GPUs:
#
#     docker build --tag IMAGE --file docker/cuda.Dockerfile .
# The GPU driver comes from the host, with the NVIDIA Container Toolkit; CUDA and cuDNN from PyPI.
FROM python:3.12-slim
WORKDIR /stackjax
COPY requirements.txt requirements-cuda.txt ./
COPY requirements requirements
RUN pip install --no-cache-dir --requirement requirements-cuda.txt
COPY configs configs
COPY stackjax stackjax
