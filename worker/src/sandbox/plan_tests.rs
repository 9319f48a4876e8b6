use super::*;
use crate::sandbox::LayeredMount;
use crate::sandbox::spec::{Bind, SpecParams, build};
use oci_spec::runtime::{LinuxNamespaceBuilder, MountBuilder};

fn request(change: impl FnOnce(&mut Spec)) -> SandboxRequest {
    let bind = Bind { source: "/host/f".into(), dest: "/a/b/f".into(), readonly: true };
    let params = SpecParams { args: vec!["true".into()], binds: vec![bind], ..SpecParams::default() };
    let mut spec = build(&params).unwrap();
    change(&mut spec);
    let null = || std::fs::File::open("/dev/null").unwrap().into();
    SandboxRequest {
        id: "x".into(),
        spec,
        rootfs: RootSource::Dir("/root".into()),
        memory_files: vec![],
        layered_mounts: vec![LayeredMount {
            dest: "/a".into(),
            source: RootSource::Dir("/src".into()),
            selector: None,
            readonly: true,
        }],
        stdio: crate::sandbox::Stdio::Files { stdin: null(), stdout: null(), stderr: null() },
        attendance: None,
    }
}

#[test]
fn the_default_spec_becomes_a_plan() {
    let plan = sandbox(&request(|_| {})).unwrap();
    assert!(plan.cgroup.confine_devices && plan.cgroup.namespace && plan.cgroup.limits == Limits::default());
    let Task::Sandbox(sandbox) = &plan.task else { panic!("{plan:?}") };
    assert_eq!(sandbox.process.capabilities.effective, 0xa804_25fb);
    assert_eq!(sandbox.process.umask, 0o022);
    // Parents first, whichever list they come from.
    let dests: Vec<_> = sandbox.mounts.iter().map(|m| m.dest.to_str().unwrap()).collect();
    let place = |d| dests.iter().position(|x| *x == d).unwrap();
    assert!(place("/a") < place("/a/b/f") && place("/dev") < place("/dev/pts"));
    let bind = &sandbox.mounts[place("/a/b/f")];
    assert_eq!(bind.source, MountSource::Bind { path: "/host/f".into(), recursive: true });
    assert_eq!(bind.attrs, MountAttrFlags::MOUNT_ATTR_RDONLY.bits());
}

#[test]
fn what_a_plan_cannot_say_is_refused_by_name() {
    let mount = |typ: &str, options: &[&str]| {
        MountBuilder::default()
            .destination("/m")
            .typ(typ)
            .source("x")
            .options(options.iter().map(|o| (*o).to_owned()).collect::<Vec<_>>())
            .build()
            .unwrap()
    };
    type Change = Box<dyn FnOnce(&mut Spec)>;
    let linux = |f: fn(&mut oci_spec::runtime::Linux)| -> Change {
        Box::new(move |spec: &mut Spec| {
            let mut linux = spec.linux().clone().unwrap();
            f(&mut linux);
            spec.set_linux(Some(linux));
        })
    };
    let ext4 = mount("ext4", &[]);
    let shared = mount("bind", &["bind", "shared"]);
    let cases: Vec<(Change, &str)> = vec![
        (
            Box::new(move |s| {
                s.set_mounts(Some(vec![ext4]));
            }),
            "ext4",
        ),
        (
            Box::new(move |s| {
                s.set_mounts(Some(vec![shared]));
            }),
            "shared",
        ),
        (
            linux(|l| {
                let user = LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::User).build().unwrap();
                l.set_namespaces(Some(vec![user]));
            }),
            "user namespace",
        ),
        (
            linux(|l| {
                l.set_namespaces(Some(vec![]));
            }),
            "mount namespace",
        ),
        (
            linux(|l| {
                l.set_mount_label(Some("x".into()));
            }),
            "SELinux",
        ),
        (
            Box::new(|s| {
                let mut process = s.process().clone().unwrap();
                process.set_apparmor_profile(Some("docker-default".into()));
                s.set_process(Some(process));
            }),
            "AppArmor",
        ),
    ];
    for (change, named) in cases {
        match sandbox(&request(change)) {
            Err(SandboxError::Unsupported(text)) => assert!(text.contains(named), "{text}"),
            other => panic!("{named}: {other:?}"),
        }
    }
}

#[test]
fn ids_and_sources_are_checked() {
    for id in ["", "a/b", "..", "a b"] {
        let mut request = request(|_| {});
        request.id = id.into();
        assert!(matches!(check(&request), Err(SandboxError::Invalid(_))), "{id:?}");
    }
    let mut request = request(|_| {});
    request.rootfs = RootSource::Overlay { lowers: vec![], upper: Some("/u".into()), work: None };
    assert!(matches!(check(&request), Err(SandboxError::Invalid(_))));
}
