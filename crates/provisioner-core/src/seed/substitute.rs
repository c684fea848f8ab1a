//! The substitution the base package's templates are written for: that of Python's `string.Template.safe_substitute`.

/// `template` with every `$NAME` and `${NAME}` that `value` knows replaced, and every `$$` made into `$`.
///
/// A name is `[_a-zA-Z][_a-zA-Z0-9]*`, the longest that fits, and its case counts. An unknown name stays as it stands,
/// and so does a `$` that begins nothing. What was put in is not looked at again. There are no errors.
pub fn safe_substitute<'v>(template: &str, value: impl Fn(&str) -> Option<&'v str>) -> String {
    let mut out = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        let (name, len) = if let Some(behind) = after.strip_prefix('$') {
            out.push('$');
            rest = behind;
            continue;
        } else if let Some(braced) = after.strip_prefix('{') {
            let name = identifier(braced);
            let closed = !name.is_empty() && braced[name.len()..].starts_with('}');
            (if closed { name } else { "" }, name.len() + 2)
        } else {
            let name = identifier(after);
            (name, name.len())
        };
        // For a `$` that begins nothing, only the `$` itself is passed over: another may follow right behind.
        let len = if name.is_empty() { 0 } else { len };
        match value(name).filter(|_| !name.is_empty()) {
            Some(value) => out.push_str(value),
            None => out.push_str(&rest[at..=at + len]),
        }
        rest = &after[len..];
    }
    out.push_str(rest);
    out
}

/// The identifier `text` begins with; empty if it begins with none.
fn identifier(text: &str) -> &str {
    if text.bytes().next().is_none_or(|b| b.is_ascii_digit()) {
        return "";
    }
    let end = text.bytes().position(|b| !(b == b'_' || b.is_ascii_alphanumeric())).unwrap_or(text.len());
    &text[..end]
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use proptest::prelude::*;
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;

    use super::*;

    fn known(name: &str) -> Option<&'static str> {
        match name {
            "VM_NAME" => Some("web1"),
            "a" => Some("$b ${b} $$"),
            "b" => Some(""),
            "_" => Some("under"),
            "B2" => Some("ü"),
            _ => None,
        }
    }

    #[test]
    fn replaces_known_names_and_nothing_else() {
        for (template, expected) in [
            ("", ""),
            ("hostname: ${VM_NAME}.$VM_NAME", "hostname: web1.web1"),
            ("$VM_NAMES ${VM_NAME ${} ${ } $", "$VM_NAMES ${VM_NAME ${} ${ } $"),
            ("cost: $$5 $5 $$$VM_NAME $${VM_NAME}", "cost: $5 $5 $web1 ${VM_NAME}"),
            ("$vm_name ${Vm_Name}", "$vm_name ${Vm_Name}"),
            ("$a", "$b ${b} $$"),
            ("${VM_NAME$VM_NAME}", "${VM_NAMEweb1}"),
            ("$ü ${ü} $VM_NAMEü", "$ü ${ü} web1ü"),
        ] {
            assert_eq!(safe_substitute(template, known), expected, "{template:?}");
        }
    }

    /// Templates made of the pieces that matter, glued together at random; among them the two characters that fold to
    /// ASCII letters when case is ignored.
    fn template() -> impl Strategy<Value = String> {
        const PIECES: [&str; 20] = [
            "$", "$", "$", "{", "}", "VM_NAME", "a", "b", "B2", "_", "9", "A", "\u{17f}", "\u{212a}", "\u{131}", " ",
            "\n", "-", "ü", "\u{feff}",
        ];
        prop::collection::vec(prop::sample::select(&PIECES[..]), 0..14).prop_map(|pieces| pieces.concat())
    }

    #[test]
    fn agrees_with_python() {
        const SCRIPT: &str = r#"
import json, string, sys
known = {"VM_NAME": "web1", "a": "$b ${b} $$", "b": "", "_": "under", "B2": "\u00fc"}
json.dump([string.Template(t).safe_substitute(known) for t in json.load(sys.stdin)], sys.stdout)
"#;
        let mut runner = TestRunner::default();
        let strategy = prop_oneof![9 => template(), 1 => "\\PC{0,20}".prop_map(|s| s.replace('%', "$"))];
        let templates: Vec<String> = (0..20_000).map(|_| strategy.new_tree(&mut runner).unwrap().current()).collect();
        let mut python = Command::new("python3")
            .args(["-c", SCRIPT])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 is needed to compare with");
        python.stdin.take().unwrap().write_all(&serde_json::to_vec(&templates).unwrap()).unwrap();
        let output = python.wait_with_output().unwrap();
        assert!(output.status.success());
        let expected: Vec<String> = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(expected.len(), templates.len());
        for (template, expected) in templates.iter().zip(&expected) {
            assert_eq!(&safe_substitute(template, known), expected, "{template:?}");
        }
    }

    proptest! {
        #[test]
        fn text_without_a_dollar_stays(text in "[^$]*") {
            prop_assert_eq!(safe_substitute(&text, known), text);
        }

        #[test]
        fn doubled_dollars_protect_any_text(text in ".*") {
            prop_assert_eq!(safe_substitute(&text.replace('$', "$$"), known), text);
        }
    }
}
