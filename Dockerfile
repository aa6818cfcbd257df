# The page and the trainer in one image. See "Docker" in README.md for how to run it.
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-runtime-ubuntu24.04
FROM ${CUDA_IMAGE}

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

# A fixed user without privileges. The base image's own user holds the id 1000, which volumes of a desktop user need.
RUN (userdel --remove ubuntu 2>/dev/null || true) \
    && useradd --uid 1000 --create-home fluxgui \
    && mkdir -p /data /models /datasets /runs \
    && ln -s /models /data/models \
    && ln -s /datasets /data/datasets \
    && ln -s /runs /data/runs \
    && chown -R fluxgui:fluxgui /data /models /datasets /runs

# The package index's own torch wheel is the CUDA build on Linux. There is no GPU while an image is built, so the
# choice is made here rather than by looking for one.
ENV FLUXGUI_TORCH_INDEX=none \
    FLUXGUI_HOME=/data \
    GRADIO_ANALYTICS_ENABLED=False \
    PYTHONUNBUFFERED=1

WORKDIR /app
# First only what the environment depends on, so that a change of the code does not install everything again.
COPY run.py requirements.txt requirements-test.txt ./
RUN PIP_NO_CACHE_DIR=1 python3 run.py setup
COPY . .

USER fluxgui
VOLUME ["/models", "/datasets", "/runs"]
EXPOSE 7860

# `docker run IMAGE` starts the page; `docker run IMAGE train --flags...` trains; `docker run IMAGE demo ...` shows the
# demo. app.py listens on all interfaces only with a password in FLUXGUI_AUTH (user:password).
ENTRYPOINT ["python3", "/app/run.py"]
CMD ["--listen", "--no-browser"]
