//! End-to-end speed: each workload runs `kiln build` against a daemon of its own, and, where `BUILDKITD` and
//! `BUILDCTL` name a peer's binaries, the same work there; without a peer, `runc run` of `true` is the baseline.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kiln_integration::tools::{self, run};
use kiln_integration::{Context, Kiln, Registry, layout, wait_until};
use tempfile::TempDir;

const ROUNDS: usize = 5;

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// A daemon and the client that drives it.
trait Builder {
    fn build(&self, context: &Path) -> Duration;
}

struct Ours(Kiln);

impl Builder for Ours {
    fn build(&self, context: &Path) -> Duration {
        let start = Instant::now();
        self.0.build(context, &[]).ok();
        start.elapsed()
    }
}

struct Peer {
    client: String,
    address: String,
    child: std::process::Child,
    _state: TempDir,
}

impl Peer {
    fn start(registry: &Registry) -> Option<Self> {
        let (daemon, client) = (std::env::var("BUILDKITD").ok()?, std::env::var("BUILDCTL").ok()?);
        let state = TempDir::new().expect("temporary directory");
        let config = state.path().join("buildkitd.toml");
        let address = &registry.address;
        std::fs::write(
            &config,
            format!(
                "[worker.oci]\n  enabled = true\n  networkMode = \"host\"\n[worker.containerd]\n  enabled = false\n\
                 [registry.\"docker.io\"]\n  mirrors = [\"{address}\"]\n[registry.\"{address}\"]\n  http = true\n"
            ),
        )
        .expect("write the peer's configuration");
        let socket = state.path().join("peer.sock");
        let child = Command::new(daemon)
            .arg("--config")
            .arg(&config)
            .arg("--root")
            .arg(state.path().join("state"))
            .args(["--addr", &format!("unix://{}", socket.display())])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("start the peer");
        wait_until("the peer to answer", Duration::from_secs(30), || {
            std::os::unix::net::UnixStream::connect(&socket).is_ok()
        });
        Some(Self { client, address: format!("unix://{}", socket.display()), child, _state: state })
    }
}

impl Builder for Peer {
    fn build(&self, context: &Path) -> Duration {
        let start = Instant::now();
        let context = context.display();
        run(Command::new(&self.client).args(["--addr", &self.address, "build", "--progress", "plain"]).args(
            [
                "--frontend".to_owned(),
                "dockerfile.v0".to_owned(),
                "--local".to_owned(),
                format!("context={context}"),
                "--local".to_owned(),
                format!("dockerfile={context}"),
            ],
        ));
        start.elapsed()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = Command::new("kill").arg(self.child.id().to_string()).status();
        let _ = self.child.wait();
    }
}

/// Something that no earlier round has built.
fn fresh() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/uuid").expect("a random number").trim().to_owned()
}

fn chain(steps: usize) -> Context {
    let nonce = fresh();
    Context::new(
        &(0..steps)
            .fold("FROM busybox\n".to_owned(), |text, step| text + &format!("RUN true {nonce}{step}\n")),
    )
}

fn small_files(steps: usize) -> Context {
    let nonce = fresh();
    Context::new(
        &(0..steps)
            .fold("FROM busybox\n".to_owned(), |text, step| text + &format!("RUN echo {nonce} > /f{step}\n")),
    )
}

fn wide(stages: usize) -> Context {
    let nonce = fresh();
    let mut text = "FROM busybox AS base\n".to_owned();
    for stage in 0..stages {
        text += &format!("FROM base AS s{stage}\nRUN echo {nonce} > /f{stage}\n");
    }
    text += "FROM base\n";
    for stage in 0..stages {
        text += &format!("COPY --from=s{stage} /f{stage} /\n");
    }
    Context::new(&text)
}

/// A name, the steps in it (for a time per step), and what one round does.
type Workload<'a> = (&'a str, usize, Box<dyn Fn(&dyn Builder) -> Duration>);

fn workloads() -> Vec<Workload<'static>> {
    vec![
        ("chain of 40 RUN true", 40, Box::new(|builder| builder.build(chain(40).path()))),
        ("chain of 40 RUN, a small file each", 40, Box::new(|builder| builder.build(small_files(40).path()))),
        ("128 parallel stages", 128, Box::new(|builder| builder.build(wide(128).path()))),
        (
            "cached rebuild of 10 steps",
            10,
            Box::new(|builder| {
                let context = small_files(10);
                builder.build(context.path());
                builder.build(context.path())
            }),
        ),
    ]
}

/// Median time of `runc run` of `true` in the busybox image, the price of one step elsewhere.
fn runc_baseline() -> Duration {
    let directory = TempDir::new().expect("temporary directory");
    let bundle = directory.path().join("bundle");
    tools::unpack(&layout("busybox"), "latest", &bundle);
    let spec = bundle.join("config.json");
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&spec).expect("umoci's config.json")).expect("JSON");
    config["process"]["terminal"] = false.into();
    config["process"]["args"] = serde_json::json!(["true"]);
    std::fs::write(&spec, config.to_string()).expect("write config.json");
    median(
        (0..20)
            .map(|round| {
                let start = Instant::now();
                run(Command::new("runc")
                    .args(["run", "--bundle"])
                    .arg(&bundle)
                    .arg(format!("kiln-bench-{}-{round}", std::process::id())));
                start.elapsed()
            })
            .collect(),
    )
}

fn resident_kib(pid: u32) -> u64 {
    std::fs::read_to_string(format!("/proc/{pid}/status"))
        .ok()
        .and_then(|text| {
            text.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse().ok())
        })
        .unwrap_or(0)
}

fn main() {
    let only: Vec<String> = std::env::args().skip(1).collect();
    let wanted = |name: &str| only.is_empty() || only.iter().any(|word| name.contains(word.as_str()));
    let registry = Registry::with_busybox();

    if wanted("start") {
        let context = Context::new("FROM scratch\n");
        let mut kiln = Kiln::new(&registry);
        kiln.build(context.path(), &[]).ok();
        let cold = (0..ROUNDS)
            .map(|_| {
                kiln.stop();
                let start = Instant::now();
                kiln.build(context.path(), &[]).ok();
                start.elapsed()
            })
            .collect();
        let warm = (0..ROUNDS)
            .map(|_| {
                let start = Instant::now();
                kiln.build(context.path(), &[]).ok();
                start.elapsed()
            })
            .collect();
        let (cold, warm) = (median(cold), median(warm));
        let resident: u64 = kiln.daemons().into_iter().map(resident_kib).sum();
        println!(
            "{:<38} {:>8.1} ms more than with the daemon running; idle {:.1} MiB resident",
            "start on demand",
            milliseconds(cold.saturating_sub(warm)),
            resident as f64 / 1024.0
        );
    }

    let mut kiln = Kiln::new(&registry);
    kiln.start();
    let ours = Ours(kiln);
    let peer = Peer::start(&registry);
    let baseline = peer.is_none().then(runc_baseline);
    if let Some(baseline) = baseline {
        println!("{:<38} {:>8.1} ms", "baseline: runc run true", milliseconds(baseline));
    }
    for (name, steps, work) in workloads() {
        if !wanted(name) {
            continue;
        }
        work(&ours);
        if let Some(peer) = &peer {
            work(peer);
        }
        let (mut mine, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            mine.push(work(&ours));
            if let Some(peer) = &peer {
                theirs.push(work(peer));
            }
        }
        let ratio = if theirs.is_empty() {
            baseline.map(|time| time.as_secs_f64() * steps as f64 / median(mine.clone()).as_secs_f64())
        } else {
            let mut ratios: Vec<f64> = mine
                .iter()
                .zip(&theirs)
                .map(|(mine, theirs)| theirs.as_secs_f64() / mine.as_secs_f64())
                .collect();
            ratios.sort_by(f64::total_cmp);
            Some(ratios[ratios.len() / 2])
        };
        let time = median(mine);
        println!(
            "{name:<38} {:>8.1} ms, {:>6.2} ms a step, {:>7.0} steps/s, {} {:.2}x",
            milliseconds(time),
            milliseconds(time) / steps as f64,
            steps as f64 / time.as_secs_f64(),
            if peer.is_some() { "peer/ours" } else { "runc per step/ours" },
            ratio.unwrap_or(f64::NAN)
        );
    }
}
