# Untested: neither a daemon of Docker nor a GPU was at hand. The driver of the GPU is the host's.
#   docker build -t twotower .                                                  for CPUs
#   docker build -t twotower-gpu --build-arg LOCK=requirements-gpu.lock .       with CUDA
#   docker run --rm --gpus all twotower-gpu                   the doctor, which says on which device a step ran
#   docker run --rm --gpus all -v "$PWD:/work" -w /work twotower-gpu train --data prepared --run run
#   docker run --rm -p 8500-8501:8500-8501 -v "$PWD/models:/models" twotower serve --models /models --host 0.0.0.0
FROM python:3.11-slim
ARG LOCK=requirements.lock
WORKDIR /twotower
COPY requirements.lock requirements-gpu.lock ./
RUN pip install --no-cache-dir --require-hashes -r "$LOCK"
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation .
ENTRYPOINT ["twotower"]
CMD ["doctor"]
