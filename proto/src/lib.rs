//! The language that Kiln's parts and its clients speak: generated wire types, and what every side
//! needs of LLB. Nothing here does I/O.

#[allow(missing_docs, clippy::all, unreachable_pub, rustdoc::all)]
mod generated {
    /// `moby.buildkit.v1`: the control API.
    pub mod moby {
        pub mod buildkit {
            pub mod v1 {
                tonic::include_proto!("moby.buildkit.v1");
                pub mod types {
                    tonic::include_proto!("moby.buildkit.v1.types");
                }
                pub mod frontend {
                    tonic::include_proto!("moby.buildkit.v1.frontend");
                }
                pub mod apicaps {
                    tonic::include_proto!("moby.buildkit.v1.apicaps");
                }
                pub mod sourcepolicy {
                    tonic::include_proto!("moby.buildkit.v1.sourcepolicy");
                    pub mod policysession {
                        tonic::include_proto!("moby.buildkit.v1.sourcepolicy.policysession");
                    }
                }
            }
            pub mod secrets {
                pub mod v1 {
                    tonic::include_proto!("moby.buildkit.secrets.v1");
                }
            }
        }
        pub mod filesync {
            pub mod v1 {
                tonic::include_proto!("moby.filesync.v1");
            }
        }
        pub mod upload {
            pub mod v1 {
                tonic::include_proto!("moby.upload.v1");
            }
        }
        pub mod sshforward {
            pub mod v1 {
                tonic::include_proto!("moby.sshforward.v1");
            }
        }
        pub mod exporter {
            pub mod v1 {
                tonic::include_proto!("moby.exporter.v1");
            }
        }
    }
    pub mod pb {
        tonic::include_proto!("pb");
    }
    pub mod errdefs {
        tonic::include_proto!("errdefs");
    }
    pub mod stack {
        tonic::include_proto!("stack");
    }
    pub mod fsutil {
        pub mod types {
            tonic::include_proto!("fsutil.types");
        }
    }
    pub mod containerd {
        pub mod services {
            pub mod content {
                pub mod v1 {
                    tonic::include_proto!("containerd.services.content.v1");
                }
            }
        }
    }
    pub mod google {
        pub mod rpc {
            tonic::include_proto!("google.rpc");
        }
    }
    pub mod kiln {
        pub mod explain {
            pub mod v1 {
                tonic::include_proto!("kiln.explain.v1");
            }
        }
    }
    pub mod grpc {
        pub mod health {
            pub mod v1 {
                tonic::include_proto!("grpc.health.v1");
            }
        }
    }
    pub mod opentelemetry {
        pub mod proto {
            pub mod collector {
                pub mod trace {
                    pub mod v1 {
                        tonic::include_proto!("opentelemetry.proto.collector.trace.v1");
                    }
                }
            }
            pub mod trace {
                pub mod v1 {
                    tonic::include_proto!("opentelemetry.proto.trace.v1");
                }
            }
            pub mod resource {
                pub mod v1 {
                    tonic::include_proto!("opentelemetry.proto.resource.v1");
                }
            }
            pub mod common {
                pub mod v1 {
                    tonic::include_proto!("opentelemetry.proto.common.v1");
                }
            }
        }
    }
}

pub use generated::containerd::services::content::v1 as content;
pub use generated::errdefs;
pub use generated::fsutil::types as fsutil;
pub use generated::google::rpc;
pub use generated::grpc::health::v1 as health;
/// `kiln.explain.v1`: why steps of a build were not cached.
pub use generated::kiln::explain::v1 as explain;
pub use generated::moby::buildkit::secrets::v1 as secrets;
pub use generated::moby::buildkit::v1 as control;
pub use generated::moby::buildkit::v1::apicaps;
pub use generated::moby::buildkit::v1::frontend as gateway;
pub use generated::moby::buildkit::v1::sourcepolicy as policy;
/// `moby.buildkit.v1.sourcepolicy.policysession`: a client that decides about sources itself.
pub use generated::moby::buildkit::v1::sourcepolicy::policysession;
pub use generated::moby::buildkit::v1::types;
pub use generated::moby::exporter::v1 as exporter;
/// `moby.filesync.v1`: file transfer and registry credentials (one package, two services).
pub use generated::moby::filesync::v1 as filesync;
pub use generated::moby::sshforward::v1 as sshforward;
pub use generated::moby::upload::v1 as upload;
pub use generated::opentelemetry::proto as otlp;
pub use generated::pb;
pub use generated::stack;

/// All descriptions of messages and services, as a `google.protobuf.FileDescriptorSet`.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

pub mod gomode;
pub mod json;
pub mod llb;
pub mod parallel;
pub mod pattern;
pub mod platform;
pub mod reference;
