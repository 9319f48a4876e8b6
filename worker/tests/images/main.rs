//! Layers, registries, images and exporters through the crate's public border, against a real
//! registry and real readers of images where these matter.

mod attestations;
mod damage;
mod exports;
mod hostile;
mod layers;
mod pulls;
mod registries;
mod support;
mod trust;
