//! The results for people: a table in the terminal, Markdown for the documentation, a picture.

mod picture;
mod table;

pub use self::{
    picture::svg,
    table::{markdown, terminal},
};

/// A number with as many digits as tell something, and groups of three: 12,345, 123, 12.3, 1.23.
fn number(value: f64) -> String {
    match value {
        _ if value < 9.995 => format!("{value:.2}"),
        _ if value < 99.95 => format!("{value:.1}"),
        _ => grouped(value.round() as u64),
    }
}

fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits_or_all_before_the_point() {
        let texts = [0.0, 0.128, 9.99, 9.999, 12.34, 99.96, 999.6, 1234.5, 1_234_567.0].map(number);
        assert_eq!(texts, ["0.00", "0.13", "9.99", "10.0", "12.3", "100", "1,000", "1,235", "1,234,567"]);
    }
}
