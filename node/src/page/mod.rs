//! What all HTML reports have in common: one file, nothing is loaded from elsewhere, nothing needs a script.

pub mod bars;
pub mod plot;

use std::fmt::Write as _;

use plot::Plot;

/// The look.
const STYLE: &str = include_str!("style.css");

/// The beginning of a page.
pub fn begin(title: &str) -> String {
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n\
         <title>{}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n",
        escape(title)
    )
}

/// The end of a page, with the version of the program and the command that makes the same numbers as JSON.
pub fn end(page: &mut String, version: &str, command: &str) {
    // Writing to a string can't fail.
    let _ = write!(
        page,
        "<footer>verdict {} · the same numbers as JSON: <code>{}</code></footer>\n</main>\n</body>\n</html>\n",
        escape(version),
        escape(command)
    );
}

/// Figures that are to be seen first, each with its name.
pub fn write_tiles(page: &mut String, tiles: &[(String, &str)]) {
    *page += "<div class=\"tiles\">\n";
    for (value, name) in tiles {
        let _ = writeln!(page, "<div class=\"tile\"><b>{}</b><span>{name}</span></div>", escape(value));
    }
    *page += "</div>\n";
}

/// A plot with its legend.
pub fn write_plot(page: &mut String, plot: &Plot) {
    let _ = write!(page, "<div class=\"card\"><div class=\"legend\"><span>{}</span>", escape(&plot.title));
    for curve in &plot.curves {
        let _ = write!(page, "<span><i class=\"{}\"></i>{}</span>", curve.class, escape(&curve.name));
    }
    let _ = writeln!(page, "</div>{}</div>", plot.svg());
}

/// Text inside HTML and SVG.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '"' => escaped += "&quot;",
            '\'' => escaped += "&#39;",
            other => escaped.push(other),
        }
    }
    escaped
}

/// A number with its thousands apart.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Fails if a page needs anything but itself.
    pub fn check_that_it_stands_alone(page: &str) {
        for elsewhere in ["<script", "http:", "https:", "src=", "@import", "url("] {
            assert!(!page.contains(elsewhere), "{elsewhere} is in the page");
        }
        for nonsense in ["NaN", "inf<", "\"inf\""] {
            assert!(!page.contains(nonsense), "{nonsense} is in the page");
        }
        for element in ["svg", "table", "div", "details"] {
            let (opened, closed) = (format!("<{element}"), format!("</{element}>"));
            assert_eq!(page.matches(&opened).count(), page.matches(&closed).count(), "{element}");
        }
    }

    #[test]
    fn thousands_stand_apart() {
        assert_eq!([0, 999, 1000, 1_234_567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
    }

    #[test]
    fn a_page_stands_alone_and_its_text_is_escaped() {
        let mut page = begin("<script>");
        end(&mut page, "1 & 2", "x \"y\" 'z'");
        check_that_it_stands_alone(&page);
        assert!(page.contains("1 &amp; 2") && page.contains("x &quot;y&quot; &#39;z&#39;"));
    }
}
