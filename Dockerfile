# Kiln's own image, in which it takes buildkitd's place: docker buildx's docker-container and Kubernetes drivers start it.
#
#   kiln build -t registry.example.org/kiln --push .
#   docker buildx create --driver docker-container --driver-opt image=registry.example.org/kiln

ARG RUST=docker.io/library/rust:1-bookworm
ARG DEBIAN=docker.io/library/debian:bookworm-slim

FROM ${RUST} AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ libclang-dev make python3 git
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/root/.cache/kiln \
    --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    make build && install -D target/release/kiln /out/kiln

FROM ${DEBIAN}
# What is run by others (git, ssh) and needed to trust registries; empty if the base image has it.
ARG PACKAGES="ca-certificates git libstdc++6 openssh-client"
RUN test -z "$PACKAGES" || { \
      apt-get update && apt-get install -y --no-install-recommends $PACKAGES && rm -rf /var/lib/apt/lists/*; }
COPY --from=build /out/kiln /usr/bin/kiln
RUN ln -s kiln /usr/bin/buildkitd && ln -s kiln /usr/bin/buildctl
VOLUME /var/lib/buildkit
ENTRYPOINT ["buildkitd"]
