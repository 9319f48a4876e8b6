//! What the end-to-end tests share: a loopback registry, a Kiln of one's own, and independent tools
//! that read what it made. Nothing here knows Kiln's inside: it runs the `kiln` binary.

pub mod fake_registry;
pub mod kiln;
pub mod lab;
pub mod peers;
pub mod tools;
pub mod web;

pub use fake_registry::FakeRegistry;
pub use kiln::{Built, Kiln};
pub use lab::{Context, Moments, Registry, free_port, layout, wait_until};
pub use web::{WebAnswer, WebRequest, WebServer};
