//! Symbolic and octal permission changes (`u+rwX,go-w`, `0755`) as `COPY --chmod` sends them.

/// A parsed change of permission bits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ModeChange {
    /// Replaces all permission bits.
    Set(u32),
    /// Clauses applied in order.
    Clauses(Vec<Clause>),
}

/// One `who op perms` step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Clause {
    who: Who,
    op: Operator,
    perms: Perms,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Who {
    user: bool,
    group: bool,
    other: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operator {
    Add,
    Remove,
    Assign,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Perms {
    Bits {
        rwx: u32,
        conditional_x: bool,
        set_id: bool,
        sticky: bool,
    },
    /// Shift of the class whose bits are taken (6 user, 3 group, 0 other).
    CopyOf(u32),
}

impl ModeChange {
    /// Parses with an umask of 0: a clause without a class is for all classes.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let invalid = || format!("invalid mode string {text:?}");
        if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
            let bits = u32::from_str_radix(text, 8).map_err(|_| invalid())?;
            return if bits <= 0o7777 { Ok(Self::Set(bits)) } else { Err(invalid()) };
        }
        let mut clauses = Vec::new();
        for part in text.split(',') {
            let mut rest = part.chars().peekable();
            let mut who = Who::default();
            while let Some(class) = rest.next_if(|c| "ugoa".contains(*c)) {
                who.user |= matches!(class, 'u' | 'a');
                who.group |= matches!(class, 'g' | 'a');
                who.other |= matches!(class, 'o' | 'a');
            }
            if who == Who::default() {
                who = Who { user: true, group: true, other: true };
            }
            let mut any = false;
            while let Some(symbol) = rest.next() {
                let op = match symbol {
                    '+' => Operator::Add,
                    '-' => Operator::Remove,
                    '=' => Operator::Assign,
                    _ => return Err(invalid()),
                };
                any = true;
                if let Some(class) = rest.next_if(|c| "ugo".contains(*c)) {
                    let shift = match class {
                        'u' => 6,
                        'g' => 3,
                        _ => 0,
                    };
                    clauses.push(Clause { who, op, perms: Perms::CopyOf(shift) });
                    continue;
                }
                let (mut rwx, mut conditional_x, mut set_id, mut sticky) = (0, false, false, false);
                while let Some(perm) = rest.next_if(|c| "rwxXst".contains(*c)) {
                    match perm {
                        'r' => rwx |= 4,
                        'w' => rwx |= 2,
                        'x' => rwx |= 1,
                        'X' => conditional_x = true,
                        's' => set_id = true,
                        _ => sticky = true,
                    }
                }
                clauses.push(Clause { who, op, perms: Perms::Bits { rwx, conditional_x, set_id, sticky } });
            }
            if !any {
                return Err(invalid());
            }
        }
        Ok(Self::Clauses(clauses))
    }

    /// The new permission bits (with set-id and sticky) of a file or directory that has `mode`.
    pub(crate) fn apply(&self, mode: u32, is_dir: bool) -> u32 {
        match self {
            Self::Set(bits) => *bits,
            Self::Clauses(clauses) => {
                clauses.iter().fold(mode & 0o7777, |mode, clause| clause.apply(mode, is_dir))
            }
        }
    }
}

impl Clause {
    fn apply(self, mode: u32, is_dir: bool) -> u32 {
        let classes = [(self.who.user, 6, 0o4000), (self.who.group, 3, 0o2000), (self.who.other, 0, 0)];
        let (mut bits, mut mask) = (0, 0);
        for (selected, shift, set_id_bit) in classes {
            if !selected {
                continue;
            }
            mask |= 7 << shift;
            match self.perms {
                Perms::CopyOf(from) => bits |= ((mode >> from) & 7) << shift,
                Perms::Bits { rwx, conditional_x, set_id, .. } => {
                    let x = u32::from(conditional_x && (is_dir || mode & 0o111 != 0));
                    bits |= (rwx | x) << shift;
                    if set_id {
                        bits |= set_id_bit;
                    }
                    mask |= set_id_bit;
                }
            }
        }
        if let Perms::Bits { sticky: true, .. } = self.perms {
            bits |= 0o1000;
        }
        match self.op {
            Operator::Add => mode | bits,
            Operator::Remove => mode & !bits,
            Operator::Assign => (mode & !mask) | bits,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_bits_as_chmod_does() {
        let cases = [
            ("0755", 0o600, false, 0o755),
            ("4711", 0o600, false, 0o4711),
            ("u+rwX,go-w", 0o666, false, 0o644),
            ("u+rwX,go-w", 0o066, true, 0o744),
            ("a=rX", 0o750, false, 0o555),
            ("a=rX", 0o640, false, 0o444),
            ("+x", 0o644, false, 0o755),
            ("g=u", 0o740, false, 0o770),
            ("u+s,+t", 0o755, false, 0o5755),
            ("u=rw+x", 0o000, false, 0o700),
            ("go=", 0o777, false, 0o700),
        ];
        for (text, mode, dir, want) in cases {
            let got = ModeChange::parse(text).expect(text).apply(mode, dir);
            assert_eq!(got, want, "{text} on {mode:o}: {got:o}");
        }
    }

    #[test]
    fn refuses_what_is_no_mode() {
        for text in ["", "u", "8", "17777", "z+r", "u+q", "u+r,", "u~r"] {
            assert!(ModeChange::parse(text).is_err(), "{text:?}");
        }
    }
}
