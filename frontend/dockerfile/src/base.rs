//! The images that stages start from: looked up all at once, replaced by named contexts, made into
//! source operations.

use std::collections::{BTreeMap, BTreeSet};

use futures::future::try_join_all;
use kiln_proto::reference::Reference;
use kiln_proto::{llb, pb, platform};

use crate::compile::{Compiler, is_scratch};
use crate::error::{Fault, Result};
use crate::expand::NoEnv;
use crate::graph::{Meta, Out};
use crate::image::Image;
use crate::options::ResolveMode;
use crate::step::step_name;
use crate::suggest::with_suggestion;
use crate::{ImageResolver, NamedContext, ResolvedImage, lint};

/// Names that are suggested beside the file's own stages.
const COMMON_IMAGES: &[&str] = &["alpine", "busybox", "centos", "debian", "golang", "ubuntu", "fedora"];

/// A look-up that a resolver has to answer.
#[derive(Debug, Clone, PartialEq)]
enum Request {
    Image(ImageRequest),
    Context {
        /// Of the named contexts.
        key: String,
        value: String,
        platform: pb::Platform,
    },
}

#[derive(Debug, Clone, PartialEq)]
struct ImageRequest {
    reference: String,
    platform: pb::Platform,
    log_name: String,
}

/// The answer.
enum Found {
    Image(ResolvedImage),
    Context(NamedContext),
}

/// What a named context puts in the place of a name.
enum Replacement {
    Scratch,
    Image(Reference),
    Other { value: String },
}

impl Compiler<'_> {
    /// Resolves the base images of all stages that `targets` need, following ONBUILD triggers to
    /// further stages. The answer is what is needed.
    pub(crate) async fn resolve_stages(
        &mut self,
        targets: &[usize],
        resolver: &dyn ImageResolver,
    ) -> Result<BTreeSet<usize>> {
        loop {
            let needed = self.reachable(targets);
            self.resolve_bases(&needed, resolver).await?;
            let mut more = false;
            for &at in &needed {
                more |= self.take_triggers(at).map_err(|f| {
                    match (self.stages[at].lines, self.stages[at].start) {
                        (Some(lines), Some(start)) => f.within(lines).at(start),
                        _ => f,
                    }
                })?;
            }
            if !more {
                return Ok(needed);
            }
        }
    }

    async fn resolve_bases(&mut self, needed: &BTreeSet<usize>, resolver: &dyn ImageResolver) -> Result<()> {
        let mut requests: Vec<(usize, Request)> = Vec::new();
        for at in 0..self.stages.len() {
            let stage = &self.stages[at];
            if stage.base.is_some() || stage.dispatched || stage.resolved {
                continue;
            }
            let request = self.prepare_base(at, needed.contains(&at));
            let stage = &self.stages[at];
            let place = |f: Fault| match (stage.lines, stage.start) {
                (Some(lines), Some(start)) => f.within(lines).at(start),
                _ => f,
            };
            requests.extend(request.map_err(place)?.map(|r| (at, r)));
        }
        let mut unique: Vec<Request> = Vec::new();
        for (_, request) in &requests {
            if !unique.contains(request) {
                unique.push(request.clone());
            }
        }
        let mode = self.input.options.resolve_mode;
        let answers = try_join_all(unique.iter().map(|request| async move {
            let answer = match request {
                Request::Image(ImageRequest { reference, platform, log_name }) => {
                    resolver.resolve(reference, platform, mode, log_name).await.map(Found::Image)
                }
                Request::Context { key, value, platform } => {
                    resolver.context(key, value, platform).await.map(Found::Context)
                }
            };
            answer.map(|found| (request, found)).map_err(|cause| (request, cause))
        }))
        .await;
        let answers = match answers {
            Ok(answers) => answers,
            Err((failed, cause)) => {
                let asker = requests.iter().find(|(_, r)| r == failed).map(|(at, _)| &self.stages[*at]);
                let name = asker.map(|s| s.base_written.clone()).unwrap_or_default();
                let common = COMMON_IMAGES.iter().flat_map(|n| [n.to_string(), format!("{n}:latest")]);
                let names = self.stages.iter().map(|s| s.display.clone()).chain(common);
                let message = match failed {
                    Request::Image(_) => with_suggestion(
                        format!("{name}: {cause}"),
                        &name,
                        names.filter(|n| !n.is_empty()),
                        true,
                    ),
                    Request::Context { .. } => cause.to_string(),
                };
                let fault = Fault::new(message).caused_by(cause);
                return Err(match asker.and_then(|s| Some((s.lines?, s.start?))) {
                    Some((lines, start)) => fault.within(lines).at(start),
                    None => fault,
                });
            }
        };
        for (at, request) in &requests {
            match (request, answers.iter().find(|(asked, _)| *asked == request)) {
                (Request::Image(request), Some((_, Found::Image(image)))) => {
                    self.use_base(*at, request, image.clone())?;
                }
                (Request::Context { key, platform, .. }, Some((_, Found::Context(context)))) => {
                    self.use_context(*at, key, platform, context)?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Settles a base that needs no look-up, or says which look-up it needs.
    fn prepare_base(&mut self, at: usize, needed: bool) -> Result<Option<Request>> {
        self.stages[at].resolved = needed;
        let stage = &self.stages[at];
        let stage_platform = stage.platform.clone().unwrap_or_else(|| self.target_platform.clone());
        let whole_stage = match stage.name.as_str() {
            "" => None,
            name => self.named_context(name, &stage_platform)?,
        };
        if is_scratch(&stage.base_name) && whole_stage.is_none() {
            self.use_scratch(at, stage_platform);
            return Ok(None);
        }
        let written = stage.base_name.clone();
        let parsed = Reference::parse(&written).map_err(|e| {
            Fault::new(format!("failed to parse stage name {}: {e}", crate::gofmt::quote(&written)))
        })?;
        if !needed {
            return Ok(None);
        }
        let replaced = match whole_stage {
            Some(found) => Some((found, true)),
            None => {
                let familiar = parsed.familiar();
                let familiar = familiar.strip_suffix(":latest").unwrap_or(&familiar).to_string();
                self.named_context(&familiar, &stage_platform)?.map(|found| (found, false))
            }
        };
        if let Some(((key, replacement), whole_stage)) = replaced {
            let stage = &mut self.stages[at];
            if whole_stage {
                stage.commands.clear();
                stage.deps.clear();
                stage.steps = 1;
            }
            return Ok(match replacement {
                Replacement::Scratch => {
                    self.use_scratch(at, stage_platform);
                    None
                }
                Replacement::Image(image) => {
                    stage.base_name = image.to_string();
                    let log_name = format!("[context {key}] load metadata for {image}");
                    let reference = image.to_string();
                    Some(Request::Image(ImageRequest { reference, platform: stage_platform, log_name }))
                }
                Replacement::Other { value } => {
                    Some(Request::Context { key, value, platform: stage_platform })
                }
            });
        }
        let reference = parsed.with_default_tag().to_string();
        self.stages[at].base_name = reference.clone();
        let prefix = if self.input.options.multi_platform {
            format!("[{} internal]", platform::format_all(&stage_platform))
        } else {
            "[internal]".to_string()
        };
        let log_name = format!("{prefix} load metadata for {reference}");
        Ok(Some(Request::Image(ImageRequest { reference, platform: stage_platform, log_name })))
    }

    fn use_scratch(&mut self, at: usize, on: pb::Platform) {
        let stage = &mut self.stages[at];
        stage.image = Image::scratch(&on);
        stage.platform = Some(on);
        stage.dispatched |= stage.implicit;
    }

    /// Whether a named context stands for `name`.
    pub(crate) fn is_context(&self, name: &str, for_platform: &pb::Platform) -> Result<bool> {
        Ok(self.named_context(name, for_platform)?.is_some())
    }

    /// What a named context puts in the place of `name`, after its key.
    fn named_context(
        &self,
        name: &str,
        for_platform: &pb::Platform,
    ) -> Result<Option<(String, Replacement)>> {
        if is_scratch(name) || name == "context" {
            return Ok(None);
        }
        let contexts = &self.input.options.named_contexts;
        let specific = format!("{name}::{}", platform::format_all(&platform::normalized(for_platform)));
        let found = contexts.get_key_value(&specific).or_else(|| contexts.get_key_value(name));
        let Some((key, value)) = found else { return Ok(None) };
        let replacement = match value.strip_prefix("docker-image://") {
            None => Replacement::Other { value: value.clone() },
            Some("scratch") => Replacement::Scratch,
            Some(image) => {
                let parsed = Reference::parse(image)
                    .map_err(|e| Fault::new(format!("invalid image of named context {key}: {e}")))?;
                Replacement::Image(parsed.with_default_tag())
            }
        };
        Ok(Some((key.clone(), replacement)))
    }

    /// Starts a stage from files that are no image, or an image that was built just now.
    fn use_context(
        &mut self,
        at: usize,
        key: &str,
        platform: &pb::Platform,
        context: &NamedContext,
    ) -> Result<()> {
        let output = self.take_context(key, context)?;
        let image = match &context.config {
            Some(config) => Image {
                created: None,
                ..serde_json::from_slice(config)
                    .map_err(|e| Fault::new(format!("failed to parse image config for {key}: {e}")))?
            },
            None => Image::scratch(platform),
        };
        let stage = &mut self.stages[at];
        stage.base_config.clone_from(&context.config);
        stage.image = image;
        stage.platform = Some(platform.clone());
        stage.fs.output = output;
        stage.dispatched |= stage.implicit;
        Ok(())
    }

    fn use_base(&mut self, at: usize, request: &ImageRequest, found: ResolvedImage) -> Result<()> {
        let ResolvedImage { digest, config, reference } = found;
        let parse = |text: &str| {
            Reference::parse(text).map_err(|e| Fault::new(format!("failed to parse ref {text}: {e}")))
        };
        let mut image: Image = serde_json::from_slice(&config)
            .map_err(|e| Fault::new(format!("failed to parse image config of {}: {e}", request.reference)))?;
        image.created = None;
        let mut name = parse(&reference)?.with_default_tag();
        if !digest.is_empty() && name.digest() != Some(digest.as_str()) {
            name = name
                .with_digest(&digest)
                .map_err(|e| Fault::new(format!("invalid digest of {reference}: {e}")))?;
        }
        let mut used = request.platform.clone();
        let stage = &self.stages[at];
        if stage.platform.is_none() && self.implicit_target && !runs_as(&used, &image) {
            let build = &self.input.build_platform;
            if runs_as(build, &image) {
                used = build.clone();
            }
        }
        let output = if image.has_no_layers() {
            None
        } else {
            let title = match request.log_name.strip_prefix("[context ").and_then(|r| r.split_once("] ")) {
                Some((context, _)) => format!("[context {context}] {name}"),
                None => {
                    let shown = Some(&used).filter(|_| self.input.options.multi_platform);
                    step_name(&mut self.stages[at], &format!("FROM {name}"), false, shown, &NoEnv)
                }
            };
            let stage = &self.stages[at];
            let meta = Meta {
                command: (!stage.text.is_empty()).then(|| stage.text.clone()),
                lines: stage.lines,
                unnamed: stage.implicit,
                ..Meta::named(title, &[llb::caps::SOURCE_IMAGE])
            };
            Some(self.image_source(&name, &used, meta))
        };
        if let (Some(lines), true) = (self.stages[at].lines, !runs_as(&used, &image)) {
            let (actual, expected) =
                (platform::format_all(&platform::normalized(&image.platform())), platform::format_all(&used));
            let message = format!(
                "Base image {} was pulled with platform \"{actual}\", expected \"{expected}\" for current build",
                self.stages[at].base_written
            );
            self.lint.warn(lint::BASE_IMAGE_PLATFORM, lines, message);
        }
        let stage = &mut self.stages[at];
        stage.base_name = name.to_string();
        stage.base_config = Some(config);
        stage.image = image;
        stage.platform = Some(used);
        stage.fs.output = output;
        stage.dispatched |= stage.implicit;
        Ok(())
    }

    fn image_source(&mut self, name: &Reference, on: &pb::Platform, mut meta: Meta) -> Out {
        let mut attrs = BTreeMap::new();
        let mode = self.input.options.resolve_mode;
        if mode != ResolveMode::Default {
            attrs.insert("image.resolvemode".to_string(), mode.as_str().to_string());
            if mode == ResolveMode::Pull {
                meta.caps.push(llb::caps::SOURCE_IMAGE_RESOLVE_MODE);
            }
        }
        let op = pb::op::Op::Source(pb::SourceOp { identifier: format!("docker-image://{name}"), attrs });
        self.graph.add(op, Some(on), Vec::new(), meta)
    }
}

fn runs_as(platform: &pb::Platform, image: &Image) -> bool {
    platform.os == image.os && platform.architecture == image.architecture
}
