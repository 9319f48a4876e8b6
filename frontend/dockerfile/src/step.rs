//! Names of steps, e.g. `[linux/amd64->arm64 build 2/5] RUN make`.

use kiln_proto::{pb, platform};

use crate::expand::Env;
use crate::stage::Stage;

/// `[platform stage i/n] text` for the stage's next step, which is counted. `on` is the platform, if it
/// is shown; `triggered` steps come from the base's ONBUILD.
pub(crate) fn step_name(
    stage: &mut Stage,
    text: &str,
    triggered: bool,
    on: Option<&pb::Platform>,
    env: &dyn Env,
) -> String {
    if stage.steps == 0 {
        return text.to_string();
    }
    stage.step += 1;
    let mut out = String::from("[");
    if let Some(on) = on {
        out.push_str(&platform::format_all(on));
        out.push_str(&cross_target(on, env));
        out.push(' ');
    }
    if !stage.display.is_empty() {
        out.push_str(&stage.display);
        out.push(' ');
    }
    let width = stage.steps.to_string().len();
    out.push_str(&format!("{:width$}/{}] ", stage.step, stage.steps));
    if triggered {
        out.push_str("ONBUILD ");
    }
    out.push_str(text);
    out
}

/// `->arch` where a step that runs on one platform builds for another.
fn cross_target(on: &pb::Platform, env: &dyn Env) -> String {
    let parsed = env.get("TARGETPLATFORM").and_then(|p| platform::parse(p).ok());
    let target = match parsed {
        Some(p) => p,
        None => {
            let part = |name: &str| env.get(name).map(str::to_string);
            let (os, arch, variant) = (part("TARGETOS"), part("TARGETARCH"), part("TARGETVARIANT"));
            if os.is_none() && arch.is_none() && variant.is_none() {
                return String::new();
            }
            let or = |value: Option<String>, default: &str| {
                value.filter(|v| !v.is_empty()).unwrap_or(default.to_string())
            };
            platform::normalized(&pb::Platform {
                os: or(os, &on.os),
                architecture: or(arch, &on.architecture),
                variant: variant.unwrap_or_default(),
                ..Default::default()
            })
        }
    };
    if target.os != on.os {
        return format!("->{}", platform::format_all(&target));
    }
    if target.architecture == on.architecture {
        return String::new();
    }
    let variant = if target.variant.is_empty() { String::new() } else { format!("/{}", target.variant) };
    format!("->{}{variant}", target.architecture)
}
