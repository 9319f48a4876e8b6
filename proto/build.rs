//! Compiles `protos/` with a pure Rust compiler, so that no system `protoc` is needed.

use prost::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = "protos";
    println!("cargo:rerun-if-changed={root}");
    let entries = [
        "buildkit/api/services/control/control.proto",
        "buildkit/frontend/gateway/pb/gateway.proto",
        "buildkit/solver/errdefs/errdefs.proto",
        "buildkit/util/stack/stack.proto",
        "buildkit/sourcepolicy/policysession/policysession.proto",
        "buildkit/session/auth/auth.proto",
        "buildkit/session/filesync/filesync.proto",
        "buildkit/session/upload/upload.proto",
        "buildkit/session/secrets/secrets.proto",
        "buildkit/session/sshforward/ssh.proto",
        "buildkit/session/exporter/exporter.proto",
        "containerd/api/services/content/v1/content.proto",
        "grpc/health/v1/health.proto",
        "kiln/explain/v1/explain.proto",
        "opentelemetry/proto/collector/trace/v1/trace_service.proto",
    ];
    let descriptors = protox::compile(entries, [root])?;
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    // LLB is addressed by the digest of its bytes, so its maps must encode in one order.
    tonic_prost_build::configure()
        .btree_map(".pb")
        // Large and, in graphs of many vertices, rare: without this every operation takes as much.
        .boxed(".pb.Op.op.exec")
        .boxed(".pb.Op.op.build")
        .boxed(".pb.FileAction.action.copy")
        .boxed(".pb.FileAction.action.mkfile")
        // What clients print as JSON.
        .type_attribute(".kiln.explain.v1", "#[derive(serde::Serialize)]")
        .message_attribute(".kiln.explain.v1", "#[serde(rename_all = \"camelCase\")]")
        .bytes(".fsutil.types.Packet")
        .bytes(".moby.filesync.v1.BytesMessage")
        .bytes(".moby.buildkit.v1.BytesMessage")
        .bytes(".moby.upload.v1.BytesMessage")
        .bytes(".moby.sshforward.v1.BytesMessage")
        .compile_fds(descriptors)?;
    Ok(())
}
