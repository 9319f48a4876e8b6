//! Identifiers in the form that BuildKit's clients show and match: 25 random base-36 digits.

/// A new random identifier, fit for build refs and session ids.
pub fn new_id() -> String {
    const DIGITS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";
    (0..25).map(|_| char::from(DIGITS[rand::random_range(0..DIGITS.len())])).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn ids_have_the_wires_form_and_differ() {
        let (a, b) = (super::new_id(), super::new_id());
        assert_eq!(a.len(), 25);
        assert!(a.bytes().all(|c| c.is_ascii_digit() || c.is_ascii_lowercase()));
        assert_ne!(a, b);
    }
}
